"""The 107 languages, and the words of theirs that a reader of Wikipedia has to know.

Wikipedia's codes, English names and scripts; names of the file and category namespaces; what marks a disambiguation
page; headings of sections of references. A dump's <siteinfo> names its own wiki's namespaces; those here are the
aliases that pages still use: older names, and names of the wiki that a page was translated from.
"""
from typing import NamedTuple

# Wikipedia's code, English name, scripts. A star marks wikis that bots wrote most pages of: their page counts
# say little, and `curate.near_duplicates` is for them.


class Language(NamedTuple):
    code: str
    name: str
    scripts: tuple                 # Unicode script names, commonest first
    bot_written: bool


_TABLE = """
af Afrikaans Latin | am Amharic Ethiopic | an Aragonese Latin | ar Arabic Arabic | ast Asturian Latin
az Azerbaijani Latin | azb South_Azerbaijani Arabic | ba Bashkir Cyrillic | bar Bavarian Latin
be Belarusian Cyrillic | bg Bulgarian Cyrillic | bn Bengali Bengali | bpy* Bishnupriya_Manipuri Bengali
br Breton Latin | bs Bosnian Latin | ca Catalan Latin | ce* Chechen Cyrillic | ceb* Cebuano Latin | cs Czech Latin
cv Chuvash Cyrillic | cy Welsh Latin | da Danish Latin | de German Latin | el Greek Greek | en English Latin
eo Esperanto Latin | es Spanish Latin | et Estonian Latin | eu Basque Latin | fa Persian Arabic | fi Finnish Latin
fr French Latin | fy West_Frisian Latin | ga Irish Latin | gl Galician Latin | gu Gujarati Gujarati
he Hebrew Hebrew | hi Hindi Devanagari | hr Croatian Latin | ht Haitian_Creole Latin | hu Hungarian Latin
hy Armenian Armenian | id Indonesian Latin | io Ido Latin | is Icelandic Latin | it Italian Latin
ja Japanese Han+Hiragana+Katakana | jv Javanese Latin | ka Georgian Georgian | kk Kazakh Cyrillic+Latin+Arabic
km Khmer Khmer | kn Kannada Kannada | ko Korean Hangul+Han | ky Kyrgyz Cyrillic | la Latin Latin
lb Luxembourgish Latin | lmo Lombard Latin | lt Lithuanian Latin | lv Latvian Latin | mg Malagasy Latin
min* Minangkabau Latin | mk Macedonian Cyrillic | ml Malayalam Malayalam | mn Mongolian Cyrillic
mr Marathi Devanagari | ms Malay Latin | my Burmese Myanmar | nds Low_German Latin | ne Nepali Devanagari
new* Newar Devanagari | nl Dutch Latin | nn Norwegian_Nynorsk Latin | no Norwegian_Bokmål Latin | oc Occitan Latin
pa Punjabi Gurmukhi | pl Polish Latin | pms Piedmontese Latin | pnb Western_Punjabi Arabic | pt Portuguese Latin
ro Romanian Latin | ru Russian Cyrillic | scn Sicilian Latin | sco Scots Latin | sh Serbo-Croatian Latin+Cyrillic
si Sinhala Sinhala | sk Slovak Latin | sl Slovenian Latin | sq Albanian Latin | sr Serbian Cyrillic+Latin
su Sundanese Latin | sv Swedish Latin | sw Swahili Latin | ta Tamil Tamil | te Telugu Telugu
tg Tajik Cyrillic+Latin | th Thai Thai | tl Tagalog Latin | tr Turkish Latin | tt Tatar Cyrillic+Latin
uk Ukrainian Cyrillic | ur Urdu Arabic | uz Uzbek Latin+Cyrillic | vi Vietnamese Latin | vo* Volapük Latin
war* Waray Latin | yo Yoruba Latin | zh Chinese Han
"""


def _languages():
    rows = (row.split() for line in _TABLE.strip().splitlines() for row in line.split("|"))
    rows = [(code.rstrip("*"), name.replace("_", " "), tuple(scripts.split("+")), "*" in code)
            for code, name, scripts in rows]
    return {row[0]: Language(*row) for row in rows}


LANGUAGES = _languages()


# ---------------------------------------------------------------------------------------------------------------------
# Wikitext

FILE_NAMESPACES = frozenset(name.replace("_", " ") for name in """
file image media archivo imagen imaxe ficheiro imagem fichier immagine imaġni datei bild bestand afbeelding lêer
beeld fil billede mynd tiedosto kuva fájl kép soubor súbor obrázek obrázok plik grafika slika datoteka skeda figura
fișier fişier imagine fitxer imatge fitxategi irudi restr skeudenn delwedd íomhá comhad iomhá faidhle dosiero attēls
vaizdas fails pilt berkas gambar imej hình tập_tin tập talaksan larawan payl paypay hulagway fichièr imache stereo
stëmbild fasciculus imago dosya resim fayl tasvir şəkil rasm сүрөт файл изображение изображения зображення выява
датотека слика податотека сурет рәсем һүрәт ӳкерчӗк акс αρχείο εικόνα պատկեր სურათი קובץ תמונה ملف صورة پرونده تصویر
فائل وێنە پەڕگە فایل चित्र चित्रम संचिका দৃশ্য চিত্র ਤਸਵੀਰ ચિત્ર படம் దస్త్రం బొమ్మ ಚಿತ್ರ ചിത്രം ප්‍රතිරූපය ไฟล์ ภาพ
ဖိုင် ឯកសារ 파일 그림 ファイル 画像 文件 檔案 档案 图像 圖像 ስዕል picha faili àwòrán ragidi sary wêne
""".split())

CATEGORY_NAMESPACES = frozenset(name.replace("_", " ") for name in """
category categoría categoria catégorie kategorie kategori kategoria kategória kategorija kategorio kategooria
kategorya kategory kategorî kateqoriya kategoriya categorie catigurìa categorìa categuria categuría catigoria luokka
flokkur bólkur kategorėja categori catagóir roinn rummad flocc sokajy jamii kaarangay ẹ̀ka thể_loại turkum klad grup
kateggoría katiguriya sumut катэгорыя категория категорія категорија төркем категори санат ангилал катигорі κατηγορία
կատեգորիա კატეგორია קטגוריה تصنيف رده زمرہ پۆل بؤلمه श्रेणी वर्ग বিষয়শ্রেণী ਸ਼੍ਰੇਣੀ શ્રેણી பகுப்பு వర్గం ವರ್ಗ വർഗ്ഗം
ප්‍රවර්ගය หมวดหมู่ ကဏ္ဍ ចំណាត់ថ្នាក់ក្រុម 분류 カテゴリ 分类 分類 መደብ पुचः گٹھ वर्गः
""".split())

# Names of the templates and title suffixes that mark a page which only lists the meanings of a word.
DISAMBIGUATION = frozenset(name.strip() for name in """
disambig, disambiguation, dab, disamb, hndis, geodis, surname, begriffsklärung, bkl, homonymie, desambiguación,
desambiguação, desambiguació, desambig, disambigua, dp, doorverwijspagina, dubbelsinnig, flertydig, peker,
fleirtyding, förgrening, gaffel, täsmennyssivu, aðgreining, rozcestník, rozlišovacia stránka, ujednoznacznienie,
čvor, razdvojba, razločitev, razvrstavanje, вишезначна одредница, egyért, dezambiguizare, anlam ayrımı,
dəqiqləşdirmə, apartigilo, argipen, dixebra, disheñvelout, gwahaniaethu, idirdhealú, homónimos, homonimo, discretiva,
nozīmju atdalīšana, nuorodinis, täpsustuslehekülg, zeimeibu škiršona, kthjellim, mehrdüdig begreep, neibetsjuttings,
omonimia, gestion dj'omònim, desambiguassiù, disambiguasi, nyahkekaburan, paglilinaw, giklaro, pansayod, disingkek,
trang định hướng, maana, menm non, pejy mitovy anarana, telplänov, cudakirin, неоднозначность, неадназначнасць,
багатозначність, неоднозначні терміни, пояснение, појаснување, айрық, күп мәгънәләр, күп мәғәнәлелек, салаа утгатай,
текмаанисиздик, чолхалла, ибҳомзудоӣ, αποσαφήνιση, բազմիմաստություն, მრავალმნიშვნელოვანი, פירושונים, توضيح,
ابهام‌زدایی, ابهامزدایی, ضد ابہام, دقیقلشدیرمه, बहुविकल्पी शब्द, अस्पष्टता, নিরসন, দ্ব্যর্থতা নিরসন, ਗੁੰਝਲ-ਖੋਲ੍ਹ,
સંદિગ્ધ શીર્ષક, பக்கவழி நெறிப்படுத்தல், అయోమయ నివృత్తి, ದ್ವಂದ್ವ ನಿವಾರಣೆ, വിവക്ഷകൾ, වක්රෝත්ති, แก้ความกำกวม,
သံတူကြောင်းကွဲ, ណែនាំ, 동음이의, aimai, 曖昧さ回避, 消歧义, 消歧義, መንታ
""".replace("\n", " ").split(","))

# Headings of sections that hold references, links and book lists. `wikitext` cuts such a section only where it is no
# prose, and finds lists of links at the end of a page by their form too, so that a missing heading costs little.
REFERENCE_HEADINGS = frozenset(heading.strip() for heading in """
references, reference, notes, footnotes, notes and references, references and notes, citations, sources,
bibliography, further reading, external links, external link, see also, works cited, literature, einzelnachweise,
weblinks, literatur, siehe auch, quellen, anmerkungen, fußnoten, belege, beleger, um spaweck, im netz, références,
notes et références, liens externes, voir aussi, bibliographie, annexes, lien externe, articles connexes,
referencias, enlaces externos, véase también, bibliografía, notas, notas y referencias, fuentes, referencies,
ver tamién, referències, enllaços externs, vegeu també, bibliografia, notes i referències, referencias e notas,
ligazóns externas, véxase tamén, referências, ligações externas, ver também, note, collegamenti esterni,
voci correlate, altri progetti, bibliografie, note bibliografice, legături externe, vezi și, referințe,
note și referințe, surse, nòtas e referéncias, ligams extèrnes, vejatz tanben, referenties, bronnen, externe link,
externe links, zie ook, literatuur, noten en referenties, verwysings, eksterne skakels, sien ook, bronne, boarnen,
keppelings om utens, referanser, eksterne lenker, se også, litteratur, kilder, referencer, eksterne henvisninger,
kildehenvisninger, fodnoter, bakgrunnsstoff, kjelder, referansar, referenser, externa länkar, se även, källor, noter,
fotnoter, heimildir, tilvísanir, tenglar, tengt efni, neðanmálsgreinar, lähteet, viitteet, aiheesta muualla,
katso myös, kirjallisuutta, viited, välislingid, vaata ka, kirjandus, atsauces, ārējās saites, skatīt arī,
literatūra, šaltiniai, išnašos, nuorodos, taip pat skaitykite, nūruodis, viertīs, atsaucis, vuorejuos saitys, olūti,
bibliografeja, vērtīs taipoš, verīs taipoš, przypisy, linki zewnętrzne, zobacz też, uwagi, externí odkazy,
související články, poznámky, zdroje, odkazy, referencie, pozri aj, externé odkazy, iné projekty, sklici, viri,
glej tudi, zunanje povezave, opombe, izvori, vanjske poveznice, vidi još, poveznice, bilješke, literatura,
vanjski linkovi, također pogledajte, spoljašnje veze, референце, извори, види још, спољашње везе, литература,
белешке, напомене, наводи, надворешни врски, поврзано, поврзани теми, източници, външни препратки, вижте също,
бележки, примечания, ссылки, см. также, источники, внешние ссылки, примітки, посилання, джерела, література,
див. також, виноски, зноскі, спасылкі, крыніцы, літаратура, глядзі таксама, гл. таксама, заўвагі, искәрмәләр,
сылтамалар, чыганаклар, һылтанмалар, иҫкәрмәләр, шулай уҡ ҡарағыз, әҙәбиәт, шулай ук карагыз, асăрхатарусем, каçăсем, асӑрхатарусем, каҫӑсем,
сондай-ақ қараңыз, дереккөздер, сыртқы сілтемелер, пайдаланылған әдебиет, булактар, шилтемелер,
колдонулган адабияттар, мөн үзэх, эшлэл, лавлах, цахим холбоос, гадны холбоос, эзоҳ, пайвандҳо, нигаред, сарчашма,
нигаред низ, адабиёт, хьажоргаш, билгалдахарш, kaynakça, dış bağlantılar, ayrıca bakınız, notlar, kaynaklar,
istinadlar, xarici keçidlər, həmçinin bax, mənbə, mənbələr, manbalar, havolalar, yana qarang, adabiyotlar, çavkanî,
girêdanên derve, binêre, παραπομπές, εξωτερικοί σύνδεσμοι, πηγές, βιβλιογραφία, δείτε επίσης, σημειώσεις, αναφορές,
ծանոթագրություններ, արտաքին հղումներ, գրականություն, տես նաև, աղբյուրներ, სქოლიო, რესურსები ინტერნეტში, ლიტერატურა,
იხილეთ აგრეთვე, ბიბლიოგრაფია, הערות שוליים, קישורים חיצוניים, ראו גם, לקריאה נוספת, מקורות, مراجع, المراجع, مصادر,
المصادر, وصلات خارجية, روابط خارجية, انظر أيضا, انظر أيضًا, اقرأ أيضا, هوامش, ملاحظات, لينكات برانيه, شوف كمان,
منابع, پانویس, پیوند به بیرون, جستارهای وابسته, یادداشت‌ها, همچنین ببینید, قایناقلار, ائشیک باغلانتی‌لار,
بیرونی روابط, حوالہ جات, مزید دیکھیے, مزید پڑھیے, بارلے جوڑ, حوالے, सन्दर्भ, संदर्भ, बाहरी कड़ियाँ, इन्हें भी देखें,
यह भी देखें, टिप्पणी, संदर्भ और नोट्स, हे सुद्धा पहा, बाह्य दुवे, संदर्भ आणि नोंदी, सन्दर्भ सामग्री, बाह्य लिंकहरू,
बाह्य कडीहरू, यो पनि हेर्नुहोस्, लिधंसा, তথ্যসূত্র, বহিঃসংযোগ, আরও দেখুন, টীকা, গ্রন্থপঞ্জি, তথ্যসুত্র, ਹਵਾਲੇ,
ਬਾਹਰੀ ਲਿੰਕ, ਇਹ ਵੀ ਵੇਖੋ, સંદર્ભ, બાહ્ય કડીઓ, આ પણ જુઓ, மேற்கோள்கள், வெளி இணைப்புகள், இவற்றையும் பார்க்க,
வெளியிணைப்புகள், మూలాలు, బయటి లింకులు, ఇవి కూడా చూడండి, ఉల్లేఖనాలు, ಉಲ್ಲೇಖಗಳು, ಬಾಹ್ಯ ಕೊಂಡಿಗಳು, ಇದನ್ನೂ ನೋಡಿ,
അവലംബം, പുറം കണ്ണികൾ, പുറത്തേക്കുള്ള കണ്ണികൾ, ഇതും കാണുക, මූලාශ්‍ර, බාහිර සබැඳි, ආශ්‍රිත, อ้างอิง, แหล่งข้อมูลอื่น,
ดูเพิ่ม, เชิงอรรถ, หมายเหตุ, ကိုးကား, ပြင်ပလင့်များ, ဆက်စပ်ကြည့်ရန်, ឯកសារយោង, តំណខាងក្រៅ, 각주, 외부 링크, 같이 보기, 참고 문헌,
주석, 함께 보기, 脚注, 注釈, 出典, 参考文献, 外部リンク, 関連項目, 関連文献, 参考资料, 參考資料, 參考文獻, 外部链接, 外部連結, 外部連接, 参见, 參見, 注释, 註釋, 脚註, 参考, 參考, 相关条目,
相關條目, 延伸阅读, 延伸閱讀, 備註, 引用, referensi, pranala luar, lihat pula, lihat juga, catatan kaki, daftar pustaka,
bacaan lanjutan, rujukan, pautan luar, rujukan luar, tumbu luaran, cathetan suku, pranala njaba, uga delengen,
deleng uga, tingali ogé, tumbu kaluar, tutumbu luar, rujuakan, pautan lua, tham khảo, liên kết ngoài, xem thêm,
chú thích, đọc thêm, mga sanggunian, sanggunian, mga kawing panlabas, tingnan din, mga panlabas na link,
talaan ng sanggunian, mga pakisayran, mga sumpay sa gawas, mga gikuhaan, ang mga gikuhaan gitudlo sa, mga kasarigan,
mga sumpay ha gawas, viungo vya nje, marejeo, tazama pia, tanbihi, vyanzo, rohy ivelany, loharano, jereo koa,
awọn itọkasi, itokasi, referans, lyen deyò, gade tou, erreferentziak, kanpo estekak, ikus, oharrak, notennoù,
levrlennadur, liammoù diavaez, gwelet ivez, daveoù, cyfeiriadau, dolenni allanol, gweler hefyd, ffynonellau,
tagairtí, naisc sheachtracha, féach freisin, referencoj, eksteraj ligiloj, vidu ankaŭ, notoj, fontoj, referi,
extera ligilo, extera ligili, videz anke, nexus externi, notae, vide etiam, bibliographia, nexus interni, links,
hivatkozások, jegyzetek, források, külső hivatkozások, lásd még, kapcsolódó szócikkek, további információk,
további olvasnivalók, irodalom, referime, burimet, lidhje të jashtme, shih edhe, shiko edhe, referenzas, riferimenti,
lijammi di fora, liammi di fora, referenze, liamm de foeura, nòte, anliance esterne, yüms plödik, literaturo, bøkur,
keldur, slóðir, ہور ویکھو, اتہ پتہ, سرچشمے, kiekt ook, kiek ok bi, weblenken, freemit airtins, see an aw
""".replace("\n", " ").split(",")) - {""}
